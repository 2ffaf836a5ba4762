"""Named as the folder of Microsoft's checkout, and of many others."""
