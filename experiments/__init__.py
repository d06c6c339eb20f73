"""What makes results/, and the tables and figures drawn from it."""
