"""Something-Something V2: 174 things done with objects."""
