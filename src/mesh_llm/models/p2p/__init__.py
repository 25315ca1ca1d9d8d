"""Model files between nodes of the mesh: a seeder sends chunks, and a downloader takes them from several seeders."""
