"""Did it help? Scores with intervals (`scorers`), and the page that shows them (`report`)."""
