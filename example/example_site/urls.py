"""Pages for people, and probes for tests."""

from django.contrib.staticfiles.urls import staticfiles_urlpatterns
from django.urls import path

from . import views

urlpatterns = [
    path("", views.front_page, name="front-page"),
    path("sync/", views.front_page_sync, name="front-page-sync"),
    path("probe/", views.probe, name="probe"),
    path("probe/sync/", views.probe_sync, name="probe-sync"),
    path("journey/<journey_id>/", views.show_journey, name="journey"),
    # For other servers than runserver, which serves static files before they get here.
    *staticfiles_urlpatterns(),
]
