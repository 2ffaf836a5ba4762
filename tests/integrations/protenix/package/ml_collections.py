"""A dictionary whose entries are attributes too, as much of it as configurations need."""


class ConfigDict(dict):
    __setattr__ = dict.__setitem__

    def __init__(self, entries=()):
        super().__init__({k: ConfigDict(v) if isinstance(v, dict) else v for k, v in dict(entries).items()})

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def update(self, entries):
        for name, value in entries.items():
            if isinstance(value, dict) and isinstance(self.get(name), dict):
                self[name].update(value)
            else:
                self[name] = value

    def to_dict(self):
        return dict(self)
