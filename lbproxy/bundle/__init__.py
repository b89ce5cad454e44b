"""`lbproxy support-bundle`: one file to send with a report."""
