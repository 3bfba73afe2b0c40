//! Safetensors files on the disk: written whole, and read by their headers alone.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Result, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes the file, which appears whole or not at all: after an error, what was there before is as
/// it was.
///
/// # Errors
/// Those of the file system.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let (mut file, unfinished) = unfinished(path)?;
    // On the disk before it has the name: after a crash there is the old file or the new one.
    let written = (file.write_all(bytes))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written
}

/// A new file beside `path`, which becomes it once it is whole. Threads and processes that write
/// the same file have one each.
fn unfinished(path: &Path) -> Result<(File, PathBuf)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.{count}.unfinished", std::process::id()));
        let beside = path.with_file_name(name);
        match File::create_new(&beside) {
            Ok(file) => return Ok((file, beside)),
            // Left by a process of the same id that did not come to its end.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(e),
        }
    }
}

/// The header of a safetensors file, which its length stands before: JSON, if it is one.
///
/// # Errors
/// A file without a length; those of the file system.
pub fn header(path: &Path) -> Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut len = [0; 8];
    file.read_exact(&mut len)?;
    let mut header = vec![];
    file.take(u64::from_le_bytes(len))
        .read_to_end(&mut header)?;
    Ok(header)
}
