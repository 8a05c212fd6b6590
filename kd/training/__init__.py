"""Training and evaluating one student or teacher."""
