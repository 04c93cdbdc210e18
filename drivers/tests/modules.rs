//! Checks that no modules of this crate import each other in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::{fs, io};

/// Modules that each module imports, except in tests.
type Imports = BTreeMap<String, BTreeSet<String>>;

/// Returns the code of a module: its file, or all files of its folder except tests.
fn code(path: &Path) -> io::Result<String> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if name == "tests" || name == "tests.rs" {
        return Ok(String::new());
    }
    if path.is_dir() {
        return fs::read_dir(path)?.map(|entry| code(&entry?.path())).collect();
    }
    let text = fs::read_to_string(path)?;
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    Ok(text.lines().filter(is_code).flat_map(|line| [line, "\n"]).collect())
}

/// Returns the names after `crate::` in `code`, including those in braces, and the modules in lines of
/// `drivers!`.
fn named(code: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
    };
    let mut names = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            Some((group, _)) => names.extend(group.split(',').map(word)),
            None => _ = names.insert(word(rest)),
        }
    }
    let line = |line: &str| line.split_once(", pci: [")?.0.rsplit_once(": ").map(|(_, module)| module.into());
    names.extend(code.lines().filter_map(line));
    names
}

fn imports(src: &Path) -> io::Result<Imports> {
    let mut modules = BTreeMap::new();
    for entry in fs::read_dir(src)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        modules.entry(name).or_insert_with(String::new).push_str(&code(&path)?);
    }
    modules.remove("lib");
    let of = |(name, code): (&String, &String)| {
        let others = named(code).into_iter().filter(|other| other != name && modules.contains_key(other));
        (name.clone(), others.collect())
    };
    Ok(modules.iter().map(of).collect())
}

/// Returns modules of which each imports the next, and the last one the first.
fn circle(imports: &Imports) -> Option<Vec<&str>> {
    fn walk<'a>(
        imports: &'a Imports,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> Option<Vec<&'a str>> {
        let last = *path.last()?;
        for next in &imports[last] {
            if let Some(start) = path.iter().position(|module| module == next) {
                return Some(path[start..].to_vec());
            }
            if !done.contains(next.as_str()) {
                path.push(next);
                if let Some(found) = walk(imports, path, done) {
                    return Some(found);
                }
                path.pop();
            }
        }
        done.insert(last);
        None
    }
    let mut done = BTreeSet::new();
    imports.keys().find_map(|module| walk(imports, &mut vec![module], &mut done))
}

#[test]
fn no_modules_import_each_other_in_a_circle() {
    let imports = imports(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    // Imports that are known to exist must be found.
    for (module, other) in [("table", "igb"), ("igb", "intel"), ("memory", "ports"), ("vhost", "virtio")] {
        assert!(imports[module].contains(other), "{module} does not import {other}: {imports:?}");
    }
    if let Some(circle) = circle(&imports) {
        panic!("a circle: {} imports {}", circle.join(" imports "), circle[0]);
    }
}

#[test]
fn a_circle_is_found_behind_other_imports() {
    let imports = |edges: &[(&str, &[&str])]| -> Imports {
        let of = |(name, others): &(&str, &[&str])| {
            ((*name).to_owned(), others.iter().map(|&other| other.to_owned()).collect())
        };
        edges.iter().map(of).collect()
    };
    let mut edges: Vec<(&str, &[&str])> =
        vec![("a", &["b", "c"]), ("b", &["d"]), ("c", &["b", "d"]), ("d", &[])];
    assert_eq!(circle(&imports(&edges)), None);
    edges[3].1 = &["c"];
    assert_eq!(circle(&imports(&edges)), Some(vec!["b", "d", "c"]));
    assert_eq!(named("use crate::{a, b::C};\ncrate::d::E;\nX: f, pci: [D], vdev: [];"), {
        ["a", "b", "d", "f"].map(str::to_owned).into()
    });
}
