"""What `esper report` is made of: tables from MLflow, the statistics and the verdict, and the pages that tell it."""
