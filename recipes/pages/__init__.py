"""Write the pages and tables that people read: docs/*.md and parts of README.md."""
