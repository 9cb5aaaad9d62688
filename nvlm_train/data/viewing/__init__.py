"""Looking at data: real samples and steps as a self-contained HTML page."""
