"""The columns of the tables in a run folder; `harness.measuring.rows` fills those of the margins."""

MARGIN_COLUMNS = (
    *("epoch", "split", "image", "label", "prediction", "correct", "confidence", "logit_margin"),
    *("estimator", "norm", "domain", "distance", "attack_distance", "status", "target", "message"),
    *("basins", "noise_retries", "forwards", "backwards", "seconds"),
)
BOUND_COLUMNS = (
    *("epoch", "split", "image", "label", "prediction", "correct", "certifier", "norm", "domain"),
    *("lower", "upper", "solved", "seconds"),
)
