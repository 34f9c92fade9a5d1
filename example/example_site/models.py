"""Something to ask the database for."""

from django.db import models


class Book(models.Model):
    title = models.CharField(max_length=100)
    year = models.PositiveSmallIntegerField()

    class Meta:
        ordering = ("year",)

    def __str__(self) -> str:
        return self.title
