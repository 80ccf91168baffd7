"""What the pages of results were made with; `python -m studies` lists the studies."""
