//! Changes of TOML files that keep everything else in them as it is, comments too.

use crate::doctor::Step;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use toml_edit::{DocumentMut, Item, Table, TableLike, Value};

/// What a file is called before it was changed.
const BEFORE: &str = ".before-accel";

/// Does what the steps say to files, all of them or none of a file; those that were
/// changed. What was there before is kept beside each, with `.before-accel` at the end.
pub fn apply(steps: &[Step]) -> Result<Vec<PathBuf>> {
    let mut documents: BTreeMap<&Path, DocumentMut> = BTreeMap::new();
    for edit in steps.iter().filter_map(Step::edit) {
        let (path, names, key, value) = (edit.file, edit.table, edit.key, edit.value);
        if !documents.contains_key(path) {
            documents.insert(path, read(path)?);
        }
        let Some(document) = documents.get_mut(path) else {
            continue;
        };
        let change = match value {
            Some(value) => set(document.as_table_mut(), names, key, value),
            None => remove(document.as_table_mut(), names, key),
        };
        change.with_context(|| format!("cannot change {}", path.display()))?;
    }
    let mut changed = Vec::new();
    for (path, document) in documents {
        write(path, &document.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
        changed.push(path.to_owned());
    }
    Ok(changed)
}

fn read(path: &Path) -> Result<DocumentMut> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.with_context(|| format!("cannot read {}", path.display()))?,
    };
    text.parse()
        .with_context(|| format!("{} is no TOML", path.display()))
}

fn set(table: &mut dyn TableLike, names: &[String], key: &str, value: &toml::Value) -> Result<()> {
    let Some((name, rest)) = names.split_first() else {
        let value: Value = value.to_string().parse().context("a value")?;
        table.insert(key, Item::Value(value));
        return Ok(());
    };
    let item = table.entry(name).or_insert_with(|| {
        let mut table = Table::new();
        table.set_implicit(true);
        Item::Table(table)
    });
    match item.as_table_like_mut() {
        Some(table) => set(table, rest, key, value),
        None => bail!("{name} is no table"),
    }
}

fn remove(table: &mut dyn TableLike, names: &[String], key: &str) -> Result<()> {
    match names.split_first() {
        None => drop(table.remove(key)),
        Some((name, rest)) => {
            let inner = table.get_mut(name).and_then(Item::as_table_like_mut);
            if let Some(inner) = inner {
                remove(inner, rest, key)?;
            }
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let beside = |end: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let new = beside(".accel-new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    match fs::metadata(path) {
        Ok(metadata) => {
            file.set_permissions(metadata.permissions())?;
            fs::copy(path, beside(BEFORE))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_else_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        let before =
            "# mine\nversion = 2 # two\n\n[a.\"b.c\"]\n  x = 1\n\n[other]\n  list = [1,  2]\n";
        fs::write(&path, before).unwrap();
        let set = |table: &[&str], key: &str, value: toml::Value| Step::Set {
            file: path.clone(),
            table: table.iter().map(|name| (*name).to_owned()).collect(),
            key: key.to_owned(),
            value,
        };
        let table = toml::Table::from_iter([("k".to_owned(), "v".into())]);
        apply(&[
            set(&["a", "b.c"], "y", true.into()),
            set(
                &["new", "table"],
                "z",
                toml::Value::Array(vec![table.into()]),
            ),
            set(&[], "imports", toml::Value::Array(vec!["i".into()])),
            Step::Remove {
                file: path.clone(),
                table: vec!["other".to_owned()],
                key: "nothing".to_owned(),
            },
        ])
        .unwrap();
        let after = fs::read_to_string(&path).unwrap();
        for line in before.lines() {
            assert!(after.contains(line), "{line:?} is gone from\n{after}");
        }
        let parsed: toml::Table = after.parse().unwrap();
        assert_eq!(parsed["a"]["b.c"]["y"], true.into());
        assert_eq!(parsed["new"]["table"]["z"][0]["k"], "v".into());
        assert_eq!(parsed["imports"][0], "i".into());
        let kept = directory.path().join("config.toml.before-accel");
        assert_eq!(fs::read_to_string(kept).unwrap(), before);
        fs::write(&path, "a = 1\n").unwrap();
        apply(&[set(&["a"], "b", 1.into())]).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "a = 1\n");
    }
}
