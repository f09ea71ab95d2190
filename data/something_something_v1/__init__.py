"""Something-Something V1: 174 things done with objects."""
