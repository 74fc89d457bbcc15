//! Compares the public interface with a file, so that changes are visible in review.
//!
//! Every `pub` in the sources is part of the interface, because the lint `unreachable_pub` is denied. So the interface is
//! the sources without private items, bodies and comments. To accept a change:
//! `UPDATE_PUBLIC_API=1 cargo test -p c1000k-reactor --test public_api`.

#![expect(clippy::unwrap_used, reason = "a test reports errors by panicking")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use syn::{
    Attribute, Block, Fields, File, ImplItem, Item, ItemImpl, ItemTrait, TraitItem, Type,
    Visibility, parse_quote,
};

use common::descriptors::Descriptors;

const HEAD: &str = "\
// The public surface of `reactor`: private items, private fields and bodies are left out.
// Checked by `reactor/tests/public_api.rs`, which also says how to accept a change.
";

#[test]
fn the_public_interface_is_as_recorded() {
    let _descriptors = Descriptors::counted();
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let recorded = package.join("public-api.txt");
    let surface = surface(&sources(&package.join("src")));
    if std::env::var_os("UPDATE_PUBLIC_API").is_some() {
        fs::write(&recorded, &surface).unwrap();
    }
    let expected = fs::read_to_string(&recorded).unwrap();
    for (number, (now, before)) in surface.lines().zip(expected.lines()).enumerate() {
        assert_eq!(now, before, "the public surface differs from line {} on", number + 1);
    }
    assert_eq!(surface.lines().count(), expected.lines().count(), "the surface grew or shrank");
}

/// Modules for tests and the fuzzer, which are not public.
const TEST_ONLY: [&str; 4] = ["sys/fake.rs", "registered/tests.rs", "simulation.rs", "simulation"];

/// Parses all source files below a folder, in the order of their paths.
fn sources(folder: &Path) -> Vec<File> {
    let mut paths = Vec::new();
    collect_paths(folder, &mut paths);
    paths.sort();
    paths.iter().map(|path| syn::parse_file(&fs::read_to_string(path).unwrap()).unwrap()).collect()
}

fn collect_paths(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if TEST_ONLY.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        if path.is_dir() {
            collect_paths(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

fn surface(files: &[File]) -> String {
    let types: BTreeSet<String> =
        files.iter().flat_map(|file| &file.items).filter_map(public_type).collect();
    assert!(types.contains("Reactor") && types.contains("Token"), "{types:?}");
    let mut items: Vec<Item> = files
        .iter()
        .flat_map(|file| &file.items)
        .filter_map(|item| public_part(item.clone(), &types))
        .collect();
    let text = |item: &Item| {
        prettyplease::unparse(&File {
            shebang: None,
            frontmatter: None,
            attrs: Vec::new(),
            items: vec![item.clone()],
        })
    };
    items.sort_by_cached_key(|item| (order(item), text(item)));
    let body: Vec<String> = items.iter().map(text).collect();
    format!("{HEAD}\n{}", body.join("\n"))
}

/// The order of an item: exports, then types and traits, then their methods.
fn order(item: &Item) -> usize {
    match item {
        Item::Use(_) | Item::Mod(_) => 0,
        Item::Impl(item) if item.trait_.is_some() => 3,
        Item::Impl(_) => 2,
        _ => 1,
    }
}

fn public_type(item: &Item) -> Option<String> {
    match item {
        Item::Struct(item) if is_public(&item.vis) => Some(item.ident.to_string()),
        Item::Enum(item) if is_public(&item.vis) => Some(item.ident.to_string()),
        _ => None,
    }
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// The public part of an item; `None` if it has none.
fn public_part(item: Item, types: &BTreeSet<String>) -> Option<Item> {
    match item {
        Item::Fn(item) if is_for_the_fuzzer(&item.attrs) => None,
        Item::Use(item) if is_for_the_fuzzer(&item.attrs) => None,
        Item::Use(item) if is_public(&item.vis) => Some(Item::Use(item)),
        Item::Mod(mut item) if is_public(&item.vis) => {
            keep_relevant_attributes(&mut item.attrs);
            Some(Item::Mod(item))
        }
        Item::Struct(mut item) if is_public(&item.vis) => {
            keep_relevant_attributes(&mut item.attrs);
            keep_public_fields(&mut item.fields);
            Some(Item::Struct(item))
        }
        Item::Enum(mut item) if is_public(&item.vis) => {
            keep_relevant_attributes(&mut item.attrs);
            for variant in &mut item.variants {
                keep_relevant_attributes(&mut variant.attrs);
                variant
                    .fields
                    .iter_mut()
                    .for_each(|field| keep_relevant_attributes(&mut field.attrs));
            }
            Some(Item::Enum(item))
        }
        Item::Trait(item) if is_public(&item.vis) => Some(Item::Trait(without_bodies(item))),
        Item::Impl(item) => public_impl(item, types).map(Item::Impl),
        Item::Fn(item) => {
            assert!(!is_public(&item.vis), "a public function, which this test does not support");
            None
        }
        _ => None,
    }
}

fn is_for_the_fuzzer(attributes: &[Attribute]) -> bool {
    let is_fuzzing = |list: &syn::MetaList| list.tokens.to_string() == "fuzzing";
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg") && attribute.meta.require_list().is_ok_and(is_fuzzing)
    })
}

/// Removes documentation and keeps the attributes that are part of the interface.
fn keep_relevant_attributes(attributes: &mut Vec<Attribute>) {
    let telling = ["derive", "non_exhaustive", "must_use"];
    attributes.retain(|attribute| telling.iter().any(|name| attribute.path().is_ident(name)));
}

fn keep_public_fields(fields: &mut Fields) {
    match fields {
        Fields::Named(fields) => {
            let public = fields.named.iter().filter(|field| is_public(&field.vis)).cloned();
            fields.named = public.collect();
        }
        Fields::Unnamed(fields) => {
            let public = fields.unnamed.iter().filter(|field| is_public(&field.vis)).cloned();
            fields.unnamed = public.collect();
        }
        Fields::Unit => {}
    }
    fields.iter_mut().for_each(|field| keep_relevant_attributes(&mut field.attrs));
}

fn without_bodies(mut item: ItemTrait) -> ItemTrait {
    keep_relevant_attributes(&mut item.attrs);
    for part in &mut item.items {
        match part {
            TraitItem::Fn(method) => {
                keep_relevant_attributes(&mut method.attrs);
                method.default = method.default.as_ref().map(|_| empty());
            }
            TraitItem::Type(part) => keep_relevant_attributes(&mut part.attrs),
            _ => {}
        }
    }
    item
}

/// The public methods of a type, or the header of a trait implementation.
fn public_impl(mut item: ItemImpl, types: &BTreeSet<String>) -> Option<ItemImpl> {
    let Type::Path(path) = &*item.self_ty else { return None };
    if !types.contains(&path.path.segments.last()?.ident.to_string()) {
        return None;
    }
    keep_relevant_attributes(&mut item.attrs);
    if item.trait_.is_some() {
        item.items.clear();
        return Some(item);
    }
    item.items = item.items.into_iter().filter_map(public_member).collect();
    (!item.items.is_empty()).then_some(item)
}

fn public_member(member: ImplItem) -> Option<ImplItem> {
    match member {
        ImplItem::Fn(mut method) if is_public(&method.vis) => {
            keep_relevant_attributes(&mut method.attrs);
            method.block = empty();
            Some(ImplItem::Fn(method))
        }
        ImplItem::Const(mut constant) if is_public(&constant.vis) => {
            keep_relevant_attributes(&mut constant.attrs);
            Some(ImplItem::Const(constant))
        }
        _ => None,
    }
}

fn empty() -> Block {
    parse_quote!({})
}
