"""Makes the table, and puts four books in it."""

from django.db import migrations, models

BOOKS = [("The Time Machine", 1895), ("We", 1924), ("Solaris", 1961), ("The Dispossessed", 1974)]


def add_books(apps, schema_editor):
    book = apps.get_model("example_site", "Book")
    book.objects.bulk_create(book(title=title, year=year) for title, year in BOOKS)


class Migration(migrations.Migration):
    initial = True
    dependencies = ()
    operations = (
        migrations.CreateModel(
            name="Book",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("title", models.CharField(max_length=100)),
                ("year", models.PositiveSmallIntegerField()),
            ],
            options={"ordering": ("year",)},
        ),
        migrations.RunPython(add_books, migrations.RunPython.noop),
    )
