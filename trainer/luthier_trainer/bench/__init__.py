"""`luthier bench`: how fast a training or a generation is, beside other programs, the plan, and the device's limit."""
