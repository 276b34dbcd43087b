"""How lean the rows of blocks of a model become: what every choice keeps (`count.py`), and the choice (`search.py`)."""
