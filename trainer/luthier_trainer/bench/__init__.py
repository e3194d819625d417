"""`luthier bench train`: how fast a training is, and how much memory it takes, beside other programs and the plan."""
