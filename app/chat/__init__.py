"""The Chat page: conversation presenter, Markdown blocks, and the views that show them."""
