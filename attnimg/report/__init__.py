"""What commands print: JSON for machines, one screen of text for people."""
