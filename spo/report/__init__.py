"""What people look at afterwards: win rates, tables, grids, curves. No torch."""
