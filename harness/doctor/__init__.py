"""What a suite needs of a machine, and whether it is there: found out before anything is downloaded or built."""
