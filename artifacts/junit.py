"""Parity results as JUnit XML, which every CI system shows: one test case a check."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as Xml

from diffoundry.types import CheckResult, ParityResult

# What XML 1.0 allows besides tab, newline and everything from space up.
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(name: str, suites: Mapping[str, Sequence[ParityResult]]) -> bytes:
    """One suite for each entry: failed checks are failures, deferred ones skipped.

    A result or a suite without any check is a failure: nothing was proven.
    """
    root = Xml.Element("testsuites", name=name)
    for suite_name, results in suites.items():
        suite = Xml.SubElement(root, "testsuite", name=suite_name)
        cases = [(result.subject, check) for result in results for check in _checks(result)]
        if not cases:
            cases = [(suite_name, _nothing())]
        for subject, check in cases:
            _add_case(suite, f"{suite_name}.{subject}", check)
        _count(suite)
    _count(root)
    Xml.indent(root)
    text: bytes = Xml.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _checks(result: ParityResult) -> tuple[CheckResult, ...]:
    return result.checks or (_nothing(),)


def _nothing() -> CheckResult:
    return CheckResult("none", "no check ran", "failed", message="nothing was proven")


def _add_case(suite: Xml.Element, classname: str, check: CheckResult) -> None:
    name = check.level if check.name == check.level else f"{check.level}: {check.name}"
    case = Xml.SubElement(suite, "testcase", classname=_clean(classname), name=_clean(name))
    message = _clean(check.message or check.status)
    if check.status == "failed":
        failure = Xml.SubElement(case, "failure", message=message.split("\n")[0])
        failure.text = "\n".join((message, *_figures(check)))
    elif check.status == "deferred":
        Xml.SubElement(case, "skipped", message=message)
    elif check.message or check.measure:
        output = Xml.SubElement(case, "system-out")
        output.text = "\n".join((message, *_figures(check)))


def _figures(check: CheckResult) -> list[str]:
    parts = [("measured", check.measure), ("limits", check.limits)]
    return [_clean(f"{label}: {value}") for label, value in parts if value is not None]


def _count(element: Xml.Element) -> None:
    element.set("tests", str(len(list(element.iter("testcase")))))
    element.set("failures", str(len(list(element.iter("failure")))))
    element.set("skipped", str(len(list(element.iter("skipped")))))


def _clean(text: str) -> str:
    return NOT_XML.sub("\ufffd", text)
