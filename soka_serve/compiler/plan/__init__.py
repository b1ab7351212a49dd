"""What a build would do, from the manifest and the headers alone."""
