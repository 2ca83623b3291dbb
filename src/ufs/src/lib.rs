//! What lies on UFS: names, publication, chunk index, image records.
