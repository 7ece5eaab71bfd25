from tests.testing import profiles

profiles.load()
