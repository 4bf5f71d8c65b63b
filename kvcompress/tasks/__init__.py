"""Made-up texts with questions: recall documents, by seed."""
