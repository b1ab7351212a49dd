"""The pages that a build writes: report.html and the model card."""
