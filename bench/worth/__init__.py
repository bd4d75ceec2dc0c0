"""`cascade worth`: does the deep stage pay, for a bundle and a load, and at which escalated share."""
