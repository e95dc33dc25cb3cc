"""Who holds which page, and who runs next. Standard library only: no tensor is ever seen here."""
