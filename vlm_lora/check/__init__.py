"""What is in a data set and what is wrong with it; a contact sheet of it, and a clean copy."""
