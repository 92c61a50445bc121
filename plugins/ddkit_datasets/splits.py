"""The words by which other people's data name their splits, in folders, columns and arrays."""

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev")
TEST = ("test", "testing", *VALIDATION)  # the first of them that has labelled images is the test split
