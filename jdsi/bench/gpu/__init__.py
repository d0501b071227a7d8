"""`jdsi bench gpu`: a report of everything that can be measured on a GPU."""
