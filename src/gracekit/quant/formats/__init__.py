"""Files that other engines read, and files of the authors."""
