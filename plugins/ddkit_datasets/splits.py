"""The words by which data of other people's name their splits: of folders, columns, arrays, and keys of a dict."""

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev")
TEST = ("test", "testing", *VALIDATION)  # the first of them that has labelled images is the test split
