"""What several estimators share: descent, radius search, the linearised boundary, logits without their scale."""
