"""People's names, which word problems and passages share."""

NAMES = tuple(
    "Anna Ben Clara David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nora Oscar Paula Quinn Rosa Sam Tara Umar "
    "Vera Walter Xenia Yusuf Zoe Alice Boris Carmen Diego Elena Frank Gina Hugo Ines Jonas Kira Liam Mona Noah Olga "
    "Peter Ruth Simon Tina Victor Wendy Amir Bella Carl".split()
)
