"""`soka-serve compare`: methods x learning rates x seeds."""
