"""Training and evaluation of one student or teacher."""
