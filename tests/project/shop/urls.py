from django.urls import path

from . import views

urlpatterns = [
    path("customers/", views.customers),
    path("pay/", views.pay),
    path("receipt/", views.receipt),
    path("api/pay/", views.api_pay),
    path("broken/", views.broken),
]
