//! `list` and `status`, for people and for programs.

use crate::paths::Paths;
use crate::protocol::{Command, DeviceView, ExportStatus, Status};
use crate::size::show as size;
use crate::wire;
use anyhow::Result;
use std::fmt::Write as _;

fn ask(paths: &Paths) -> Result<Status> {
    wire::ask(&paths.socket, &Command::Status, None)
}

fn device(export: &ExportStatus, paths: &Paths) -> String {
    match &export.device {
        DeviceView::Ublk { path } => path.display().to_string(),
        DeviceView::Fuse { .. } => paths.export(export.root).display().to_string(),
    }
}

/// `ublk-server list`: one line per holder.
pub fn list(paths: &Paths) -> Result<String> {
    let status = ask(paths)?;
    let mut rows = vec![["HELD BY", "LAYERS", "MANIFEST", "IMAGE"].map(str::to_owned)];
    for holder in &status.holders {
        rows.push([
            holder.holder.clone(),
            holder.layers.len().to_string(),
            holder.manifest.to_string()[..19].to_owned(),
            holder.image.clone(),
        ]);
    }
    let mut text = table(&rows);
    let leftovers = super::tidy::show(paths, &status)?;
    if !leftovers.is_empty() {
        text.push_str("\nLEFT OVER (`ublk-server gc` removes what nobody uses)\n");
        for leftover in leftovers {
            writeln!(text, "{leftover}")?;
        }
    }
    Ok(text)
}

/// `ublk-server metrics`.
pub fn metrics(paths: &Paths) -> Result<String> {
    wire::ask(&paths.socket, &Command::Metrics, None)
}

/// `ublk-server status`.
pub fn status(paths: &Paths, json: bool) -> Result<String> {
    let status = ask(paths)?;
    if json {
        return Ok(serde_json::to_string_pretty(&status)? + "\n");
    }
    let cache = &status.cache;
    let mut text = String::new();
    for (name, value) in [
        (
            "daemon",
            format!("process {}, version {}", status.pid, status.version),
        ),
        (
            "transport",
            format!("{}: {}", status.transport, status.transport_reason),
        ),
        (
            "cache",
            format!(
                "{} of {}; {} hits, {} misses, {} joined, {} evicted",
                size(cache.used),
                size(cache.size),
                cache.hits,
                cache.misses,
                cache.joined,
                cache.evicted
            ),
        ),
    ] {
        writeln!(text, "{name:<10} {value}")?;
    }
    if let Some(disk) = &status.disk_cache {
        writeln!(text, "{:<10} {}: {}", "disk", disk.name, disk.state)?;
        writeln!(
            text,
            "{:<10} {} of {}; {} hits, {} misses, {} written, {} skipped, {} evicted, {} damaged, \
             {} failed",
            "",
            size(disk.used),
            size(disk.size),
            disk.hits,
            disk.misses,
            disk.written,
            disk.skipped,
            disk.evicted,
            disk.damaged,
            disk.failed
        )?;
    }
    if let Some(remake) = &status.remake {
        writeln!(
            text,
            "{:<10} {}: of {} exported layers it is known where they came from; {} made, {} failed",
            "remake",
            remake.directory.display(),
            remake.known,
            remake.made,
            remake.failed
        )?;
        for layer in &remake.layers {
            writeln!(text, "{:<10} {}: {}", "", layer.name, layer.state)?;
        }
    }
    for source in &status.sources {
        writeln!(text, "{:<10} {}: {}", "source", source.name, source.state)?;
        write!(
            text,
            "{:<10} {} in {} reads; {} attempts failed, set aside {} times; ",
            "",
            size(source.bytes),
            source.reads,
            source.failed_attempts,
            source.set_aside
        )?;
        match source.worker {
            Some(pid) => write!(text, "worker process {pid}")?,
            None => write!(text, "no worker process")?,
        }
        write!(text, ", {} started", source.workers)?;
        if source.dying > 0 {
            write!(
                text,
                ", {} killed but stuck in the kernel until the storage answers",
                source.dying
            )?;
        }
        text.push('\n');
    }
    if status.failed_reads > 0 {
        let failed = status.failed_reads;
        writeln!(text, "{:<10} {failed} reads at every source", "failed")?;
    }
    if !status.verifies {
        writeln!(text, "WARNING    this build does not verify what it serves")?;
    }
    for holder in &status.holders {
        if let Some(ready) = &holder.ready {
            write!(
                text,
                "{:<10} {}: mounted after {} ms and {}; ",
                "ready",
                holder.holder,
                ready.mounted_ms,
                size(ready.mounted_bytes)
            )?;
            match ready.metadata_ms {
                Some(time) => write!(text, "metadata complete after {time} ms")?,
                None => text.push_str("metadata not complete yet"),
            }
            writeln!(text, " and {} more", size(ready.metadata_bytes))?;
        }
    }
    if status.exports.is_empty() {
        return Ok(text);
    }
    text.push('\n');
    let heads = [
        "LAYER", "SIZE", "READ", "SERVED", "HITS", "MISSES", "ERRORS", "TRUST", "USES", "DEVICE",
    ];
    let mut rows = vec![heads.map(str::to_owned)];
    for export in &status.exports {
        let (kind, digest) = export.name.split_once(' ').unwrap_or(("", &export.name));
        let digest = digest.get(..19).unwrap_or(digest);
        rows.push([
            format!("{kind} {digest}"),
            size(export.size),
            size(export.source_bytes),
            size(export.served_bytes),
            export.hits.to_string(),
            export.misses.to_string(),
            export.errors.to_string(),
            format!("trust: {}", export.trust),
            export.holders.len().to_string(),
            device(export, paths),
        ]);
    }
    text.push_str(&table(&rows));
    Ok(text)
}

/// Columns as wide as their widest cell.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(cell);
            line.push_str(&" ".repeat(width - cell.chars().count() + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["a", "bb"], ["ccc", "d"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "a    bb\nccc  d\n");
    }
}
