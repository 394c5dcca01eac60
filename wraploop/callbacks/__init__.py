"""What else happens in a loop, one family of callbacks a file."""
