"""What residual_study.py is made of: data, networks, and one file for each kind of experiment."""
