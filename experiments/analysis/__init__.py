"""What is made of saved runs: tables, plots, pages."""
