"""The classify and pack jobs: archives are worked through every night."""
