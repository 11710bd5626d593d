"""Write the pages and tables that people read: docs/*.md and a part of README.md."""
