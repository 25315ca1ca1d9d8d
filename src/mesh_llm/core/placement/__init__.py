"""What runs where: what fits, who takes which model, when one is given up."""
